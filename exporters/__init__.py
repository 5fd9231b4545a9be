"""What runs beside the engine: discover rings, drain them, keep the session, assemble it, one file per sink."""
