"""Folders on the Hugging Face hub: named, looked up, downloaded and uploaded. `huggingface_hub` does the work; it is
imported where it is used."""
