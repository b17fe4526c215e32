"""Files of Medusa heads in every public layout: found, read and written.

Structure is read from the tensors, never from a config, and no key is skipped silently.
"""

from medusa_chat.hub.file_names import HEAD_FILES, HEADS_FILE
from medusa_chat.model.layouts.find import find_heads
from medusa_chat.model.layouts.names import is_heads_tensor
from medusa_chat.model.layouts.read import ReadHeads, read_heads
from medusa_chat.model.layouts.write import write_heads

__all__ = [
    "HEADS_FILE",
    "HEAD_FILES",
    "ReadHeads",
    "find_heads",
    "is_heads_tensor",
    "read_heads",
    "write_heads",
]
