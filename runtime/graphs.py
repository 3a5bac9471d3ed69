"""Decoding through CUDA graphs: one launch a token, not twenty-five a layer.

Place in the pipeline: in the sampler, with `--graphs`. Not yet tried on a GPU; on CPU the same static shapes
are used, without a graph, so that the tests see them.
"""
import torch


class Graphed:
    """`model.rows_hidden` for one token a row with static shapes, captured as a CUDA graph and replayed. It
    is captured anew where rows have left, or when the buffers (they double) are full."""

    def __init__(self, model):
        self.model, self.mask, self.graph = model, None, None

    def __call__(self, token, position, cache):
        """token, position (R, 1), context -> hidden (R, 1, D); in place of `model.next_hidden`."""
        if cache.mask.shape[1] == 0:                                # there are no buffers yet
            return self.model.next_hidden(token, position, cache)
        if cache.column is None or cache.used == cache.mask.shape[1]:
            cache.settle()
        if self.mask is not cache.mask:                             # rows left, or the buffers grew
            self.mask, self.graph = cache.mask, None
            self.token, self.position = token.clone(), position.clone()
        cache.extend(torch.ones_like(token, dtype=torch.bool))
        self.token.copy_(token)
        self.position.copy_(position)
        if token.device.type != "cuda":
            return self.model.rows_hidden(self.token, self.position, cache)
        if self.graph is None:
            self.capture(cache)
        self.graph.replay()
        return self.out

    def capture(self, cache):
        """Run a few times (each writes the same column again), then record."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.model.rows_hidden(self.token, self.position, cache)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self.model.rows_hidden(self.token, self.position, cache)
