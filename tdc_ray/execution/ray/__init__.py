"""Work items on a Ray cluster: the pool, its workers, services and shared results.

The only place, beside base training and the sweep, that imports Ray.
May be used by runs; everything else goes by ``execution`` alone.
"""
