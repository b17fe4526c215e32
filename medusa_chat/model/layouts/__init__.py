"""Files of Medusa heads in every public layout.

The structure of heads comes from the tensors, never from a config, and no tensor is skipped
silently.

find.py      the file of a folder that holds heads
names.py     how each layout names its tensors
tensors.py   tensors of one file or of shards, read one at a time
checked.py   tensors with their faults refused: dtype, shape, NaN
lm_heads.py  LM heads: own, shared, padded, or for a part of the vocabulary
read.py      a file's heads, checked against the backbone
config.py    configs, and where one contradicts the tensors
write.py     heads and tensors, written in one move
"""

from medusa_chat.hub.file_names import HEAD_FILES, HEADS_FILE, OWN_HEADS
from medusa_chat.model.layouts.find import find_heads
from medusa_chat.model.layouts.names import is_heads_tensor
from medusa_chat.model.layouts.read import ReadHeads, read_heads
from medusa_chat.model.layouts.write import write_heads

__all__ = [
    "HEADS_FILE",
    "HEAD_FILES",
    "OWN_HEADS",
    "ReadHeads",
    "find_heads",
    "is_heads_tensor",
    "read_heads",
    "write_heads",
]
