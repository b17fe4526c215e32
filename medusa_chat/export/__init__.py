"""`medusa-chat export`: heads in the layouts of other programs.

writing.py         writes heads in a layout, reads them back, and uploads them
targets.py         the layouts: names, configs, and what each program needs
fitting.py         heads without the parts that a layout has no place for
backbone_files.py  a backbone's files, read and copied without loading it
card.py            the model card
folder.py          the folder of an export, which is replaced as a whole
"""
