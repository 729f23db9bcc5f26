"""Every private name of torch, Ray and other libraries that raylit needs, each behind one small function. Both sides.

A file belongs to one library and says which version it was written against. Only `driver/` and `tune/` import `ray_*`.
"""
