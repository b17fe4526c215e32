"""Files in llama.cpp's GGUF format, read as model folders. No torch here.

header.py     metadata and the places of the tensors, of one file or several shards
config.py     config.json from the metadata
tokenizer.py  tokenizer.json from the vocabulary
folder.py     the folder of both, which points to the weights
choice.py     which files of a repository `OWNER/REPO:FILE-or-quant` means
"""
