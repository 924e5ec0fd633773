"""Formats and protocols of Nix: pure, no network, no database, no event loop."""
