"""Names of the files that hold weights, for those who look for them and those who download them. No torch here."""

HEADS_FILE = "medusa_lm_head.safetensors"
PICKLE_FILE = "medusa_lm_head.pt"
# Weights of a model as transformers looks for them, an index after the whole file.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Where heads may lie, the likeliest first: in a file of their own, among a model's weights, in an adapter's, in an
# engine's of TensorRT-LLM.
HEAD_FILES = (
    HEADS_FILE,
    PICKLE_FILE,
    *WEIGHTS,
    "adapter_model.safetensors",
    "adapter_model.bin",
    "rank0.safetensors",
)
