"""``python -m kvq_compile`` is the command ``kvq``."""

from kvq_compile.cli import main

main()
