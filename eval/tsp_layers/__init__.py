"""fastkv-eval tsp-layers: after which layer, and at which rate, should a model drop tokens?"""
