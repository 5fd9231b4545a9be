"""Which functions of the engines are hooked and what each hook writes; the same file names for each engine."""
