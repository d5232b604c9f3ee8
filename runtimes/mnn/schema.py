"""The part of MNN's schema that these models use: which fields a table has, in order, and what each holds.

Source: MNN 3.6.1, schema/default/{MNN,CaffeOp,TensorflowOp,Tensor,ExtraInfo,UserDefine}.fbs. Fields are only ever added
at the end of a table, so a newer file with unknown fields is told apart (`flat.read`), never misread.
"""

from __future__ import annotations

from typing import Final

# name:kind, kinds of `flat`: i8 u8 i32 u32 i64 f32 numbers, str, Table; [kind] a vector; main? the union of Op
_TEXT: Final = {
    "Net": "bizCode:str extraTensorDescribe:[TensorDescribe] extraInfo:ExtraInfo oplists:[Op] outputName:[str] "
    "preferForwardType:i8 sourceType:i8 tensorName:[str] tensorNumber:i32 usage:i8 subgraphs:[None] mnn_uuid:str",
    "ExtraInfo": "buffer:[i8] name:str version:str",
    "TensorDescribe": "blob:None index:i32 name:str regions:[None] quantInfo:TensorQuantInfo",
    "TensorQuantInfo": "scale:f32 zero:f32 min:f32 max:f32 type:i32",
    "Op": "inputIndexes:[i32] main_type:u8 main:main? name:str outputIndexes:[i32] type:i32 "
    "defaultDimentionFormat:i8 externalPath:str",
    "Blob": "dims:[i32] dataFormat:i8 dataType:i32 uint8s:[u8] int8s:[i8] int32s:[i32] int64s:[i64] float32s:[f32] "
    "strings:[str] external:[i64]",
    "Convolution2D": "common:Convolution2DCommon weight:[f32] bias:[f32] quanParameter:IDSTQuan symmetricQuan:None "
    "sparseParameter:None external:[i64]",
    "Convolution2DCommon": "padX:i32 padY:i32 kernelX:i32 kernelY:i32 strideX:i32 strideY:i32 dilateX:i32 "
    "dilateY:i32 padMode:i8 group:i32 outputCount:i32 inputCount:i32 relu:u8 relu6:u8 pads:[i32] outPads:[i32] "
    "hasOutputShape:u8",
    "IDSTQuan": "buffer:[i8] alpha:[f32] type:i32 useInt32:u8 quantScale:f32 scaleIn:f32 scaleOut:f32 aMaxOrBits:i32 "
    "aMin:i32 readType:i32 has_scaleInt:u8 shapeInt32:u8 weightSize:u32 index:[u32] alphaFp16:[u16] scaleStorage:i8",
    "LayerNorm": "axis:[i32] epsilon:f32 gamma:[f32] beta:[f32] group:i32 external:[i64] useRMSNorm:u8",
    "Input": "dims:[i32] dtype:i32 dformat:i8",
    "ArgMax": "outMaxVal:i32 topK:i32 axis:i32 softmaxThreshold:i32",
    "Axis": "axis:i32",
    "BinaryOp": "opType:i32 T:i32 activationType:i32",
    "CastParam": "srcT:i32 dstT:i32",
    "Flatten": "axis:i32 endAxis:i32",
    "Gather": "Tindices:i32 Tparams:i32 validateIndices:u8 axis:i32",
    "GatherV2": "Taxis:i32 Tindices:i32 Tparams:i32",
    "Interp": "widthScale:f32 heightScale:f32 outputWidth:i32 outputHeight:i32 resizeType:i32 alignCorners:u8 "
    "halfPixelCenters:u8 widthOffset:f32 heightOffset:f32 cubicCoeffA:f32 ctm:i8 depthScale:f32 outputDepth:i32 "
    "depthOffset:f32",
    "MatMul": "T:i32 transposeA:u8 transposeB:u8 weight:[f32] bias:[f32]",
    "PadParam": "mode:i8",
    "Permute": "dims:[i32]",
    "ReductionParam": "operation:i8 dim:[i32] coeff:f32 keepDims:u8 dType:i32",
    "Reshape": "dims:[i32] dimType:i8",
    "Slice": "axis:i32 slicePoints:[i32] sourceType:i8",
    "SliceTf": "T:i32",
    "SqueezeParam": "squeezeDims:[i32]",
    "StridedSliceParam": "Index:i32 T:i32 beginMask:i32 endMask:i32 ellipsisMask:i32 newAxisMask:i32 "
    "shrinkAxisMask:i32 fromType:i32",
    "TensorConvertInfo": "source:i8 dest:i8",
    "UnaryOp": "opType:i32 T:i32 tableInt8:[i8]",
}  # fmt: skip

TABLES: Final = {
    table: tuple((name, kind) for name, _, kind in (field.partition(":") for field in text.split()))
    for table, text in _TEXT.items()
}

# `main_type` of an Op: the place of a table in the union OpParameter.
MAINS: Final = {
    2: "ArgMax", 4: "Axis", 6: "BinaryOp", 7: "Blob", 8: "CastParam", 9: "Convolution2D", 17: "Flatten", 18: "Gather",
    19: "GatherV2", 21: "Input", 22: "Interp", 25: "MatMul", 29: "Permute", 50: "ReductionParam", 55: "Reshape",
    61: "Slice", 62: "SliceTf", 64: "SqueezeParam", 65: "StridedSliceParam", 66: "TensorConvertInfo", 70: "UnaryOp",
    84: "PadParam", 88: "LayerNorm",
}  # fmt: skip
