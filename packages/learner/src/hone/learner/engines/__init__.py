"""What turns losses into parameter updates: one Protocol, one file per implementation."""
