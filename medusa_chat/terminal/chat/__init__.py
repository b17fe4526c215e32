"""The chat: reads a message, streams the reply, runs slash-commands.

repl.py          the loop from prompt to reply
prompt.py        history, completion, keys and toolbar of the prompt
reply.py         one reply on the screen, with its figures
loading.py       the model loads on a thread while the user types
greeting.py      what a chat says first, and its session
session.py       the conversation and its measurements
growing.py       replies of a session
conversation.py  the file of a saved conversation
archive.py       the database of kept conversations
kept.py          a kept conversation as records and rows
keeping.py       keeps the conversation while it goes on
resuming.py      a kept conversation goes on
showing.py       a conversation as rows of text
exporting.py     a conversation as a document
switching.py     another model in the middle of a conversation
start.py         the settings with which a chat starts
command.py       the registry of slash-commands
commands/        the slash-commands themselves
message.py       a typed line as a message: quotes, words meant as commands
attachments.py   files that a message names
overflow.py      a conversation that outgrows the context
clipboard.py     text for the clipboard
plain.py         the prompt of plain mode
completion.py    completion of slash-commands
keyboard.py      keys and Ctrl-C during a reply
engine.py        the engine as the terminal needs it
errors.py        the chat's exceptions, and errors as one line
"""
