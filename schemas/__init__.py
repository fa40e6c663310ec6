"""What travels on the wire: one struct for each message, and nothing else. Imports msgspec only."""
