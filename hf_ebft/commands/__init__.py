"""One module for each command of `hf-ebft`; `hf_ebft/cli.py` imports them.

A command's module has a function `main(argv)`, which gets the arguments after the command's name.
It raises for data and settings that cannot work; the caller turns the error into a message.
"""
