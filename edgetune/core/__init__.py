"""What everything stands on: errors, techniques, carriers, apply and finalize, the registry, the ledger."""
