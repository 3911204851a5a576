"""What once broke a promise, kept as tests: each module says what an attacker got before."""
