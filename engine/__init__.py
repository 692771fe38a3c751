"""nudging: several language models write one text together, on one device, exactly and fast."""
