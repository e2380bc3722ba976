#!/bin/bash
# Options of `tal-fast evaluate` for a benchmark of OpenOOD 1.5 in the folder of its downloads (images_classic/,
# images_largescale/, benchmark_imglist/; no spaces in its path):
#     tal-fast evaluate --run RUN --convention openood --mix all $(examples/openood.sh cifar10 FOLDER)
#     tal-fast evaluate --run RUN --convention openood --mix all,full-spectrum $(examples/openood.sh imagenet FOLDER full)
set -eu
benchmark=${1:-} folder=${2:-}
far="far/mnist far/svhn far/texture far/places365"
case $benchmark in
    cifar10) ood="near/cifar100 near/tin $far" shift=cifar10c ;;
    cifar100) ood="near/cifar10 near/tin $far" shift= ;;
    imagenet) ood="near/ssb_hard near/ninco far/inaturalist far/textures far/openimage_o" shift="imagenet_v2 imagenet_c imagenet_r" ;;
    *) echo "usage: openood.sh cifar10|cifar100|imagenet FOLDER [full]" >&2; exit 2 ;;
esac
lists=$folder/benchmark_imglist/$benchmark
[ -d "$lists" ] || { echo "$lists is not there; name the folder that OpenOOD downloads its benchmarks to" >&2; exit 2; }
option() {  # option() --ood NAME: the images of each set are in images_classic/, but for ImageNet's
    images=$folder/images_classic
    [ "$benchmark" != imagenet ] || [ "$2" = far/textures ] || images=$folder/images_largescale
    echo "$1 $2=list:$images:$lists/test_${2##*/}.txt"
}
for name in $ood; do option --ood "$name"; done
[ "${3:-}" != full ] || for name in $shift; do option --shift "$name"; done
