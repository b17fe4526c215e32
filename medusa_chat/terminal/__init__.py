"""The user's side of the program, in the terminal. Imports neither torch nor transformers.

chat/         the chat: prompt, slash-commands, session, streaming
reports/      tables and charts of the other sub-commands
race/         a reply with heads and without, in two columns
panel.py      the figures of a reply as one or two rows
view.py       a reply as it streams
live.py       rows that are drawn again and again
markdown.py   a reply in Markdown: each block is rendered once, when it ends
rendering.py  a finished block as rows of styled text
thoughts.py   the text between <think> and </think>
fences.py     fences around code, line by line
code.py       code coloured by Pygments
source.py     text whose every character knows the style of its head
wrapping.py   model text wrapped into rows
output.py     the way out: text made safe, JSON
theme.py      colours and marks of the heads
tree_view.py  a step's candidate tree
downloads.py  progress of a download
"""
