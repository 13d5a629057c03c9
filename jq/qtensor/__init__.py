"""The quantized tensors of jaxq, as JAX pytrees."""

from jq.qtensor.affine import Affine as Affine
from jq.qtensor.base import Grouping as Grouping
from jq.qtensor.base import QTensor as QTensor
from jq.qtensor.base import Source as Source
from jq.qtensor.base import stack as stack
from jq.qtensor.blocks import Blocks as Blocks
from jq.qtensor.codebook import Codebook as Codebook
from jq.qtensor.low_rank import LowRank as LowRank
from jq.qtensor.narrow_float import NarrowFloat as NarrowFloat
from jq.qtensor.outliers import WithOutliers as WithOutliers
from jq.qtensor.plain import Plain as Plain
from jq.qtensor.rotated import Rotated as Rotated
from jq.qtensor.scaled import Scaled as Scaled
from jq.qtensor.scaled import Tiles as Tiles
from jq.qtensor.sparse import Sparse as Sparse
from jq.qtensor.transposed import Transposed as Transposed
from jq.qtensor.vector_codebook import VectorCodebook as VectorCodebook
