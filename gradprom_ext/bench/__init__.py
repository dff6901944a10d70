"""``python -m gradprom_ext.bench``: the fused step beside what PyTorch can do without it, and beside the memory.

``--what update`` times the optimizer step alone, ``--what step`` one whole training step, ``--what warm`` the optimizer
step and the functions where everything is in the caches. How they measure, so that
the numbers mean something on a noisy machine:

* Contestants take turns (A B C ... A B C ...), in an order that rotates, so that drift of the machine hits all of them.
* Medians are printed with the middle half of the samples beside them; ratios are medians of the ratios within a round.
* A ratio whose middle half is wider than a quarter of it gets a question mark, with the reason under the table and in
  the JSON file; so does an overhead in percent, if the middle half is also wider than the 2 % that it is about.
* Nothing is timed that was not compared with the library's definition before.
* The gate is open: the case with the most traffic.

The optimizer step
    The floor is the time the memory needs for the bytes a step must move (float32: 24 per parameter for SGD, 40 for
    AdamW: two gradients read, read again with the parameter and the moments, parameter and moments written; 16 and 32
    where a GPU keeps the gradients on chip), at a bandwidth measured as one more contestant.

    *On a CPU* every contestant has tensors of its own, so none finds them in the cache. The bandwidth is that of
    ``a += b`` on flat buffers as large as the model (12 bytes per element). Two things keep a step above that floor,
    and each is measured in the same rounds. A step reads more than it writes, and where reads are the bottleneck the
    time for its reads alone (20 and 28 bytes per parameter, at the bandwidth of a dot product) is longer than the
    floor. And before the kernel starts, Python finds as many gradients as there are tensors: the same step on as many
    tensors of one element is that host work, caches as cold as for all others.

    *On a GPU* the contestants share several sets of tensors, together several times the L2 cache, and walk through
    them. Device time leaves the host's launches out. Where they are few, steps over all sets are queued while the
    device is held back ("queue"): what a training loop sees whose host is ahead. Where they are many, a CUDA graph with
    one step of every set is replayed ("graph"). What waits for the device can be neither queued nor captured and is
    timed by events around eager steps ("eager"). Host time: the clock around queueing a few eager steps, the queue
    empty before. (What launches thousands of kernels in one step fills the queue all the same, and then waits for the
    device.) The bandwidth is that of a large copy, bytes read and written. The step on one-element tensors is what
    launch and grid barrier take.

The training step
    Forward and backward passes take nearly all of it, so the contestants share everything that is not the method: equal
    networks, the same batch, gradients captured by swapping ``.grad``, plain fused optimizers for VR. The floor is two
    backwards and plain optimizers. The overhead over it is printed twice: of whole steps, and, with less noise, of the
    part in which the methods differ, the update of IP, timed inside the same steps and divided by the floor's whole
    step.

Warm steps
    On a CPU, by one thread and by all: each contestant is called a few times in a row, and the quickest counts, since
    whatever else a machine does only adds. ``a += b`` on flat buffers of the model's size is beside them. The same on
    as many tensors of one element is the host's share.
"""
