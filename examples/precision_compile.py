"""Everything that makes a step cheaper, switched on at once, and the weights in a file for other programs. Driver.

bfloat16 where it is enough, compiled layers, NHWC images, gradients that travel in half, an optimizer in one kernel.
"""

import argparse

import torch
from digits import ConvNet, Digits

import raylit as pl


class Fast(ConvNet):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-workers", type=int, default=2, help="Ray actors; 0 trains in this process")
    parser.add_argument("--max-epochs", type=int, default=8)
    parser.add_argument("--backend", default="inductor", help="of torch.compile; 'aot_eager' needs no C++ compiler")
    args = parser.parse_args()

    pl.seed_everything(1)
    model = Fast()
    trainer = pl.Trainer(
        num_workers=args.num_workers,
        max_epochs=args.max_epochs,
        strategy=pl.DDPStrategy(ddp_comm_hook="bf16", bucket_cap_mb=50),
        precision="bf16-mixed",
        float32_matmul_precision="high",
        channels_last=True,
        compile={"backend": args.backend},
        benchmark=True,
        gradient_clip_val=1.0,
    )
    trainer.fit(model, Digits())
    trainer.save_weights("digits.safetensors")

    # Weights are weights: another run, in full precision and uncompiled, goes on with them.
    other = ConvNet()
    other.load_weights("digits.safetensors")
    (result,) = pl.test(other, Digits(), num_workers=0)
    print(f"test accuracy: {result['test_acc']:.4f}")


if __name__ == "__main__":
    main()
