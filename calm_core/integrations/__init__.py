"""CALM inside other libraries. Each module needs its library, and nothing else here imports them."""
