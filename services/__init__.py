"""Network-facing processes. Each imports `trackstar`; nothing in `trackstar` imports from here."""
