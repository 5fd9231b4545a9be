"""From records to the session's tables: columns in, columns out, and state that is explicit and bounded. Pure."""
