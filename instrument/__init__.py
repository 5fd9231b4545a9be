"""What runs inside the engine's process: vocabulary, records, rings, recorder, hooks. Standard library only."""
