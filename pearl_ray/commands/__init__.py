"""The commands of ``pearl-ray``, one module each. They import Ray and torch only when they run."""
