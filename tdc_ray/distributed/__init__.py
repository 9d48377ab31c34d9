"""Ray: the cluster, the pool of actors, and stage 1 under Ray Train."""
