"""Faults struck from outside at a real run of two processes, which must end as if nothing had happened."""
