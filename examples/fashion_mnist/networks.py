"""The example networks, a residual, an inverted-residual and a plain one, for 28x28 grey images in [0, 1]."""

from torch import Tensor, nn

CLASSES = 10


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them; ReLU follows the addition."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False),
                nn.BatchNorm2d(channels),
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(x)) + shortcut)


class ResidualNet(nn.Module):
    """A ResNet with three stages of 16, 32 and 64 channels, two BasicBlocks each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(BasicBlock(16, 16, 1), BasicBlock(16, 16, 1))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.flatten(self.avgpool(x)))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a shortcut where the shapes agree."""

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        self.shortcut = stride == 1 and channels_in == channels
        self.expands = expansion != 1
        if self.expands:
            self.expand = nn.Conv2d(channels_in, hidden, 1, bias=False)
            self.expand_bn = nn.BatchNorm2d(hidden)
            self.expand_relu = nn.ReLU6()
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(hidden)
        self.depthwise_relu = nn.ReLU6()
        self.project = nn.Conv2d(hidden, channels, 1, bias=False)
        self.project_bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand_relu(self.expand_bn(self.expand(x))) if self.expands else x
        y = self.depthwise_relu(self.depthwise_bn(self.depthwise(y)))
        y = self.project_bn(self.project(y))
        return x + y if self.shortcut else y


class InvertedResidualNet(nn.Module):
    """MobileNetV2's shape on small images: stem, inverted residuals at 14 and 7 pixels, 1x1 head, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(16)
        self.stem_relu = nn.ReLU6()
        self.blocks = nn.Sequential(
            InvertedResidual(16, 24, 2, 1),
            InvertedResidual(24, 24, 1, 4),
            InvertedResidual(24, 24, 1, 4),
            InvertedResidual(24, 48, 2, 4),
            InvertedResidual(48, 48, 1, 4),
            InvertedResidual(48, 48, 1, 4),
        )
        self.head = nn.Conv2d(48, 192, 1, bias=False)
        self.head_bn = nn.BatchNorm2d(192)
        self.head_relu = nn.ReLU6()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(192, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_relu(self.stem_bn(self.stem(x)))
        x = self.blocks(x)
        x = self.head_relu(self.head_bn(self.head(x)))
        return self.fc(self.flatten(self.avgpool(x)))


class ConvolutionPair(nn.Module):
    """Two 3x3 convolutions without a shortcut, then 2x2 max-pooling."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.pool(x)


class PlainNet(nn.Module):
    """VGG's shape on small images: three pairs of convolutions with 16, 32 and 64 channels, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Sequential(ConvolutionPair(1, 16), ConvolutionPair(16, 32), ConvolutionPair(32, 64))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.avgpool(self.pairs(x))))


NETWORKS: dict[str, type[nn.Module]] = {
    "residual": ResidualNet,
    "inverted_residual": InvertedResidualNet,
    "plain": PlainNet,
}
