"""The foundation of all other layers; nothing here is public."""
