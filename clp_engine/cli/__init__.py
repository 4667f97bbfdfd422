"""The command line, clp-engine: `main` and a file for each command.

main.py         the parser of all commands, exit codes, errors as one line
arguments.py    flags that several commands share, and the reading of weights and numbers
train.py, evaluate.py, ...    a command each: HELP, EPILOG, `add_arguments(parser)`, `run(arguments)`
"""
