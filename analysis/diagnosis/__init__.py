"""Names the causes of slowness in a session, with their evidence and the next experiment."""
