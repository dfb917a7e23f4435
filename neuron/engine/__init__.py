"""The engine inside a device worker: who runs this step, what it computes, what comes out."""
