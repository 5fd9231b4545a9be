"""What runs after: load a session, break its time down, report."""
