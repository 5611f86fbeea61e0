"""Runs the command line: `python -m keras_learnbits`."""

from keras_learnbits.command_line.main import main

if __name__ == "__main__":
    main()
