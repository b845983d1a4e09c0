"""Which request runs when and where: core, router, replicas, scheduler, slots, capacity."""
