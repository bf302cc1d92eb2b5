"""What small networks learn at which frequency."""
