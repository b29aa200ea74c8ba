"""`python -m sstmerge`, which launchers such as `accelerate launch -m` need."""

from sstmerge.cli import main

main()
