"""One module for each command, with `main(args) -> exit code`; `twohop.trainer.cli` imports the one it needs."""
