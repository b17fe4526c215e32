"""Names of the files that hold weights, for search and download. No torch here."""

HEADS_FILE = "medusa_lm_head.safetensors"
PICKLE_FILE = "medusa_lm_head.pt"
# A model's weights in the order in which transformers looks for them.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Places of heads, the likeliest first: a file of their own, a model's weights, an adapter, and an
# engine of TensorRT-LLM.
HEAD_FILES = (
    HEADS_FILE,
    PICKLE_FILE,
    *WEIGHTS,
    "adapter_model.safetensors",
    "adapter_model.bin",
    "rank0.safetensors",
)
