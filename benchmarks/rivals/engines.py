"""Inference engines: forward only, weights fixed when the layer is loaded."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np

from benchmarks.rivals.contender import Contender, Unsupported
from benchmarks.rivals.layer import Case, Inputs


def onnx_model(
    onnx: Any,
    nodes: list[Any],
    inputs: dict[str, tuple[int, ...]],
    y_shape: tuple[int, ...],
    opset: int,
    constants: dict[str, np.ndarray] | None = None,
) -> Any:
    """A model with float32 inputs and the result y."""
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info(name, number, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", number, y_shape)],
        [onnx.numpy_helper.from_array(a, name) for name, a in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


class OnnxRuntime(Contender):
    """onnxruntime's DeformConv, with weights as an initializer so that it can pack them."""

    module = "onnxruntime"

    def start(self) -> None:
        import onnx  # builds the graph
        import onnxruntime

        self.onnx, self.runtime = onnx, onnxruntime

    def load(self, case: Any, w: Any) -> None:
        helper, shapes = self.onnx.helper, case.shapes
        names = ["x", "offsets", "mask"] if case.mask else ["x", "offsets"]
        node = helper.make_node(
            "DeformConv",
            ["x", "w", "offsets", "", "mask"] if case.mask else ["x", "w", "offsets"],
            ["y"],
            kernel_shape=[case.kernel] * 2,
            strides=[case.stride] * 2,
            pads=[case.padding] * 4,
            dilations=[case.dilation] * 2,
            group=case.groups,
            offset_group=case.offset_groups,
        )
        self.build(node, {name: shapes[name] for name in names}, shapes["y"], 19, {"w": w})

    def build(
        self,
        node: Any,
        inputs: dict[str, tuple[int, ...]],
        y_shape: tuple[int, ...],
        opset: int,
        constants: dict[str, np.ndarray] | None = None,
    ) -> None:
        """The session of a single node with float32 inputs, and its y."""
        self.open(onnx_model(self.onnx, [node], inputs, y_shape, opset, constants), y_shape)

    def open(self, model: Any, y_shape: tuple[int, ...]) -> None:
        """The session of a model, and its y."""
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.spin else "0")
        options.log_severity_level = 3
        try:
            self.session = self.runtime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except self.runtime.capi.onnxruntime_pybind11_state.NotImplemented as error:
            raise Unsupported(str(error)) from error
        self.y = np.ones(y_shape, np.float32)
        self.y_value = self.runtime.OrtValue.ortvalue_from_numpy(self.y)

    def arrays(self, inputs: Any) -> dict[str, np.ndarray]:
        """The graph's inputs by name."""
        named = {name: getattr(inputs, name) for name in ("x", "offsets", "mask")}
        return {name: a for name, a in named.items() if a is not None}

    def convert(self, inputs: Any) -> Any:
        binding, arrays = self.session.io_binding(), self.arrays(inputs)
        for name, a in arrays.items():
            binding.bind_ortvalue_input(name, self.runtime.OrtValue.ortvalue_from_numpy(a))
        binding.bind_ortvalue_output("y", self.y_value)
        return binding, arrays  # the binding refers to the arrays' memory

    def forward(self, given: Any) -> Any:
        self.session.run_with_iobinding(given[0])
        return self.y_value

    def result(self, y: Any) -> np.ndarray:
        return y.numpy()

    def y_bytes(self) -> int:
        return self.y.nbytes


class OpenVino(Contender):
    """OpenVINO's DeformableConvolution-8 with zero extension, with weights as a constant."""

    module = "openvino"

    def start(self) -> None:
        import openvino
        import openvino.opset9

        self.openvino, self.ops = openvino, openvino.opset9
        self.core = openvino.Core()

    def load(self, case: Any, w: Any) -> None:
        ops, shapes = self.ops, case.shapes
        names = ["x", "offsets", "mask"] if case.mask else ["x", "offsets"]
        args = {name: ops.parameter(shapes[name], np.float32, name=name) for name in names}
        node = ops.deformable_convolution(
            args["x"],
            args["offsets"],
            ops.constant(w),
            [case.stride] * 2,
            [case.padding] * 2,
            [case.padding] * 2,
            [case.dilation] * 2,
            **({"mask": args["mask"]} if case.mask else {}),
            group=case.groups,
            deformable_group=case.offset_groups,
            bilinear_interpolation_pad=True,
        )
        self.build(node, list(args.values()), shapes["y"])

    def build(self, node: Any, parameters: list[Any], y_shape: tuple[int, ...]) -> None:
        """The request of one node and its y."""
        self.open(self.openvino.Model([node], parameters, "layer"), y_shape)

    def open(self, model: Any, y_shape: tuple[int, ...]) -> None:
        """The request of a model and its y."""
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,  # the worker pins the process
        }
        self.request = self.core.compile_model(model, "CPU", settings).create_infer_request()
        self.y = np.ones(y_shape, np.float32)
        self.request.set_output_tensor(0, self.openvino.Tensor(self.y, shared_memory=True))

    def arrays(self, inputs: Any) -> list[np.ndarray]:
        """The node's inputs in the order of its parameters."""
        return [a for a in (inputs.x, inputs.offsets, inputs.mask) if a is not None]

    def convert(self, inputs: Any) -> Any:
        arrays = self.arrays(inputs)
        return [self.openvino.Tensor(a, shared_memory=True) for a in arrays], arrays

    def forward(self, given: Any) -> np.ndarray:
        for index, tensor in enumerate(given[0]):
            self.request.set_input_tensor(index, tensor)
        self.request.infer(share_inputs=True, share_outputs=True)
        return self.y

    def y_bytes(self) -> int:
        return self.y.nbytes


class Ncnn(Contender):
    """ncnn's DeformableConv2D in float32; it has no batch, so image by image; one offset group."""

    module = "ncnn"

    def start(self) -> None:
        import ncnn

        self.ncnn = ncnn
        ncnn.set_omp_num_threads(self.threads)

    def load(self, case: Case, w: np.ndarray) -> None:
        if case.groups > 1 or case.offset_groups > 1:
            raise Unsupported("ncnn has neither groups nor offset groups")
        names = ["x", "offsets", "mask"] if case.mask else ["x", "offsets"]
        lines = ["7767517", f"{len(names) + 1} {len(names) + 1}"]
        lines += [f"Input {name} 0 1 {name}" for name in names]
        settings = f"0={case.c_out} 1={case.kernel} 2={case.dilation} 3={case.stride} 4={case.padding} 5=0 6={w.size}"
        lines += [f"DeformableConv2D y {len(names)} 1 {' '.join(names)} y {settings}"]
        self.net = self.ncnn.Net()
        options = self.net.opt
        options.num_threads = self.threads
        options.openmp_blocktime = 20 if self.spin else 0
        options.use_vulkan_compute = False
        options.use_packing_layout = True
        for name in dir(options):
            if name.startswith(("use_fp16", "use_bf16", "use_int8")):
                setattr(options, name, False)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "layer.bin")
            with open(path, "wb") as file:
                file.write(np.zeros(1, np.int32).tobytes() + w.tobytes())  # flag 0: raw float32 follows
            if self.net.load_param_mem("\n".join(lines) + "\n") != 0 or self.net.load_model(path) != 0:
                raise RuntimeError("ncnn did not load the layer")

    def convert(self, inputs: Inputs) -> Any:
        named = [(name, a) for name, a in zip(("x", "offsets", "mask"), inputs[:3], strict=True) if a is not None]
        # a clone has ncnn's own aligned channels, unlike a Mat that wraps an array
        return [[(name, self.ncnn.Mat(a[n]).clone()) for name, a in named] for n in range(len(inputs.x))]

    def forward(self, given: Any) -> list:
        images = []
        for mats in given:
            extractor = self.net.create_extractor()
            for name, mat in mats:
                extractor.input(name, mat)
            status, y = extractor.extract("y")
            if status != 0:
                raise RuntimeError(f"ncnn returned {status}")
            images.append(y)
        return images

    def result(self, y: list) -> np.ndarray:
        return np.stack([np.array(image) for image in y])


# deformable convolution contenders by name
ENGINES: dict[str, type[Contender]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino, "ncnn": Ncnn}
