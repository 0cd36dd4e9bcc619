"""``python -m kvq_compile`` is the command ``kvq``."""

from kvq_compile.cli import main

if __name__ == "__main__":  # a process that another one spawns imports this file again
    main()
