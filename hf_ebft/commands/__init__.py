"""What people type: one module for each command of `hf-ebft`, which `hf_ebft/cli.py` imports.

A command's module has `main(argv)`, which gets the command line after the command's name. It
raises for data and settings that cannot work; the caller turns that into a message.
"""
