"""Errors, techniques, carriers, apply and finalize, the registry, the ledger: imported by every other room."""
