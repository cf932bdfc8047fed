"""For authors of sources that read stored rows: the store's protocol, buffers, the order, the source."""
