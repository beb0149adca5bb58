"""Writes torch's two file formats by hand, pickles included, so that tests can also write bad ones.

Independent of `topk_jax` and of `pickle`; what it writes was read with torch 2.14 once.
"""

import io
import struct
import zipfile
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, None) or name) for name in STORAGES}
MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {
    "protocol_version": 1001,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}


@dataclass(frozen=True)
class Global:
    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """function(*arguments), by REDUCE."""

    function: Any
    arguments: tuple


@dataclass(frozen=True)
class Persistent:
    """A value handed over as a persistent id."""

    value: Any


@dataclass(frozen=True)
class Raw:
    """Opcodes put in as they are."""

    opcodes: bytes


@dataclass
class Writer:
    """Collects storages while tensors are described."""

    storages: dict[str, np.ndarray] = field(default_factory=dict)

    def storage(self, array, *, view=None, legacy=False, size=None) -> Persistent:
        key = next((k for k, held in self.storages.items() if held is array), None)
        if key is None:
            key = str(len(self.storages))
            self.storages[key] = array
        cls = Global("torch", STORAGES[array.dtype.name])
        value = ("storage", cls, key, "cpu", array.size if size is None else size)
        return Persistent((*value, view) if legacy else value)

    def tensor(self, array, *, offset=0, shape=None, strides=None, **storage) -> Call:
        """The whole of `array` by default, else a look into its (flat) elements."""
        flat = array.reshape(-1) if shape is None else array
        if shape is None:
            shape = array.shape
            strides = tuple(int(np.prod(shape[i + 1 :], dtype=int)) for i in range(len(shape)))
        return Call(
            Global("torch._utils", "_rebuild_tensor_v2"),
            (
                self.storage(flat, **storage),
                offset,
                tuple(shape),
                tuple(strides),
                False,
                Call(Global("collections", "OrderedDict"), ()),
            ),
        )


def parameter(tensor: Call) -> Call:
    hooks = Call(Global("collections", "OrderedDict"), ())
    return Call(Global("torch._utils", "_rebuild_parameter"), (tensor, True, hooks))


def encode(value: Any) -> bytes:
    """Opcodes of protocol 2 that leave `value` on the stack."""
    if value is None:
        return b"N"
    if value is True or value is False:
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(value, tuple):
        return b"(" + b"".join(map(encode, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(encode, value)) + b"e"
    if isinstance(value, dict):
        items = b"".join(encode(k) + encode(v) for k, v in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, Global):
        return b"c" + f"{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        return encode(value.function) + encode(value.arguments) + b"R"
    if isinstance(value, Persistent):
        return encode(value.value) + b"Q"
    if isinstance(value, Raw):
        return value.opcodes
    raise TypeError(type(value))


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + encode(value) + b"."


def zip_bytes(
    value: Any,
    storages: dict[str, np.ndarray],
    *,
    root: str = "archive",
    byteorder: str | None = "little",
    extra: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
    pickle: bytes | None = None,
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", pickled(value) if pickle is None else pickle)
        if byteorder is not None:
            archive.writestr(f"{root}/byteorder", byteorder)
        for key, array in storages.items():
            archive.writestr(f"{root}/data/{key}", array.tobytes())
        archive.writestr(f"{root}/version", "3\n")
        for name, data in (extra or {}).items():
            archive.writestr(name, data)
    return buffer.getvalue()


def legacy_bytes(
    value: Any,
    storages: dict[str, np.ndarray],
    *,
    magic: Any = MAGIC,
    protocol: Any = 1001,
    system: Any = None,
    counts: dict[str, int] | None = None,
) -> bytes:
    parts = [pickled(part) for part in (magic, protocol, system or SYSTEM, value, list(storages))]
    for key, array in storages.items():
        parts += [struct.pack("<q", (counts or {}).get(key, array.size)), array.tobytes()]
    return b"".join(parts)


def state_dict_bytes(arrays: dict[str, np.ndarray], *, legacy: bool = False) -> bytes:
    """A plain state_dict as torch.save writes it."""
    writer = Writer()
    tensors = {k: writer.tensor(a, legacy=legacy) for k, a in arrays.items()}
    ordered = Call(Global("collections", "OrderedDict"), ())
    items = b"".join(encode(k) + encode(v) for k, v in tensors.items())
    # OrderedDict(), its items, then its attributes (_metadata) by BUILD.
    metadata = {"_metadata": {"": {"version": 1}}}
    value = Raw(encode(ordered) + b"(" + items + b"u" + encode(metadata) + b"b")
    return (legacy_bytes if legacy else zip_bytes)(value, writer.storages)


# Written by torch 2.14.1 (torch.save of the checkpoint that the tests describe), zlib, base85.
GOLDEN_ZIP = (
    "c-p0yU2q#$700hETXvMhcG9FtLz)KawhB!ZeM@eW*ilopWeasSDTt7utfaLiDrt3gubd`eYMR<fprxO*X(??Ah32"
    "JGW_Y0Vf$@|VUU*=p!|+gMU>K$YFU&B*V<((@?^@n_6-Pwg@zLl0f9Jn<?>+a(Q<}e@kf9;cag379#IQ@1>a4l1Y"
    ")~WIe7u&+4wK{3G2b@_B$OXOf!VZ574T{Pd=TF`)SzaeTrE-PE0wHT%`DNX)o_B3+GW!=%ZKrsAo%y_&>zZgLcz3"
    "Y(3WjF;Yj$jS)Hj+7${K-4TK9VTCF+3f^8OC)mpjGG;E`8QqvAXV3kv-*>EhoFdGZPU?`Ly<c2KUm@#2UNP@YVWz"
    "eJI!yv57`|z9y1oM7;E;U=QUJFpza6}`TPwUhC=V7B3(EOV3JPco~FyA8-Ms?V9fxp>&9&XZMOCAT4%vR0Qu(g7T"
    "D?=3lj>65A_1bm{+m2}cNa<gM?fAmC2)78>4ho;sVJ9CtY8wrwX*p&YZe6BST>UO)D8Tf$p|8Lq>=ydZQ}}`oxAX"
    "iCHJdP|D(^Ugf`J9NlRexeR3QrZ_{BWC{pJ%*qfy43cT3J=uov|{3iq(g+<6#ZkVV)h7!e9l9b)+a%Um*Qh7EB+a"
    "0mJkt1;6a=LCnwAt|6KgzniRKxqmY9md66syFEwxL0zLfcsEHDC}oW(90qmU^iqD4hp~og-IO_<=5fK<?uASzo`U"
    "dB{PSuR<UNb?cC4FNjQvTKZOVQH7-C-^DV%Gg8C4JhjsXpml{ohCQ%<UYSV4zBb=FnFAL^ZT;`*UIVG4!DCjyI<#"
    ")RrE-pilNziOgeB1^<#=&X$ssMk@1?L&~>jHe7!Z&m{!6$q<Ty4;J3{FbahZ`%C{+k?_fr0>@a)AZ|76lNOZ&?R("
    "1&B7MCE(GDWv?J-IC2~+0$FvD-(twe1+qq=u0w-Q7>>+<B@yqh7<L=j%=fYN69EuJ+a)@TNCmM)VOEFJuE`chJ|U"
    "0g8M<=Q&j@4`&I;tWUF3Hda!w$>OW{c!=3SFT%c{ZmWFmglCO##IF*qlPPrJkgMqCuc^As-VaIrN9-{*6wfF;aeg"
    "%y6lzkeprsxCY`2S4N&GHcon7EE|f^Er-F<Ql6<tM%$x(}w5g-~~~3d7*_D=inuc%)!g~5&W!f)y)QN)eFVe^faF"
    "RqxM4LKI8BT`W&F}D)Wiu;1cusn(+BLg&*tihU4Tn;JLik7G`X#)pXz|C*jRGcq_yyH5)EJIPsg;*zr0aCw{I2Z="
    "ZypYQ$(6Enba^rbFRpvVjD=Bi8@VJ?sA$6yDY0N-I324G#ThVPWGjgtC}gb&uLc?rQH*;c3gR8?@k#TP}OMvQ=I4"
    "h_YnA{`V*6*tBJ_da@lPy^_q`O$tV>I@4f-oy*4mpM2_(N-zTxr{SM$VEV3WU=x{W8z|z0w%AUZ%ih;Z-sPiKrL<"
    "-;4+{tWeha&cf$Mr0CI_XiU|%Gcy>|@;1a<x(K1>iYi7}6Hd4f68|MBT<+wqI-T^#L|9Yu555V^tpn3GK6AI3b!W"
    "sD_^zhaO>*b8Co#)x1{VoYJ2!f0a5V_d*^9^(?mWsEBrzr^_95W9}24t>%%g`iViu47ETj#w_cn{@ZTdy?e{f4K7"
    "_w%Yo;<d~Fm#B<sGYneXB2VFAr(EQV<7E3zR_CT)bVZZDlk;`U!_Heyx-6H2n=CY&Y+V_8GN!D)RWBT6{q4hn?zt"
    "j!QzmE{{0LwP`{@Y_ctiSZy*5Bk3o9!%r{kO-S>mh$;ZTUaDdi5&f4!Cnje__WM+jll}agmW-jOVfm(p!F(n`M6Q"
    "(qG>1e*GilfKqL+0FL)Q0H2WomVDPA(lPeK!`~&jvV5b_wXWaai~Q!lULEZve{8M!eZ<G||LWY+7kkOS=K3XSzZ}"
    "fa$q#QmzJ*nSE{66ghOn63O>QXv63=Jd@#hoW>-UJK18Da-Yuf+gL6-fGZ_Yf{z5m!nVk-?0zg)+(tJndZHP}!4L"
    "baUBhHubJG!coV(}`p<l}f~uu~=$+JQ;~aBk4>clNwJYqnUUnl}ht2sq(kx??UJ!#9jLOc;$9|di%xE4(ICsF;um"
    ";0o*1j-wBY_I!qPfZQ^#wjoTo(PUom{yp7l<iSwd|({2D&xwmT?mgF}N5v6xiwcbue)?QJyQB~{hKxA!mouZAYT5"
    "sndYd==C@n!9`dkgQueqPI+hML#A!^_$wRhv|`-u+tEhSn?El&baawX*gVRh#a(zn&dZxxX6}ZAR64_c&SmhN>M`"
    "wcagiM9#ZWof{n!%e%kG;+Hza9W%?jImqIhhE;LL)bbW`C3A;3u8O@?Sr(6tsN#;v<t?hR_+^iHm15$pb-N_-=26"
    "n63QuW)z~1GW?Z2n3+^Rh991zbRj4t=^0p8Ak?4BTg4i5x`W-C8mocljA9~Sr"
)
GOLDEN_LEGACY = (
    "c-noH*>~GS6vpK>sk=jgmNo1ti}4o6W@(%@O<U9@QCY+iT-jD)7unJ$jnbxI2uqx_Y-Mjtfv^{zc!akcp7=9(<xk"
    ")oIOUEcJ5dq!@zpXK{l0HzuI|i-&m^?JFOL5;aQxE5j^up!(4P@Hwjm74TLeKcOr7afT`SM3rq$3}2vG-lBR$a?j"
    "A?3FZPgk|3*jX>L5*zAP|H^1lxiW;Ms!e)QKMDYO@^2lmLqi6Xfedas2t@Cy)}bAF>2dgP2OKM^lBX;G2$RCrZBZ"
    "!Yg8G+RdS-KRYpdv#1XTmnrdx~o+J?2DRH^2^un~NFxynEWGZ<=ZOqh3y2^C3T2Gd3*3hg(*;FfbL#vey#Z;OqQ_"
    "Te8|I>x3ElW4cvzY|?1_$Ln$B=F+Gb;MsR}$lzuCSwSV*=~sP1L8DEf(^*%+OG}kSpeqa7JD=Y^)dKhZ#0Zih>vt"
    "!(wC+8^yR75krgEbh^$*v6*3ugsn@?%{7a-R>C%CvSu6V30zkv8}<IWUnW<~6mvOTUtce7C;SbQVw9NC4z|-psDm"
    "9Y`bLJEB;4$-l&Q2VL$}l#Zn+xsR*!ibw;bop0dgMi;C7dJ2g98b?s6PjOf_)#)oAy4w0kEB5?jC^KkRf#_c7cr;"
    "Q_gyr@%==Y1PQvgTb@{ol-~=Ekv}3xHo6KDY_6kNV~)gLsmjgj&pBSMN>=+xjb*_4pRR0RxZCPkxi%4xm>Q0!muY"
    "%Ac>ux(IUgc5*~4LwP~<9Jo;akgvjReL&XdpBZNSRUEC%4>|lg1cn2jHH_EVE!X9}Yy;@67^K8oJFy=ElrrQ-w?O"
    "EOH)5#3yQt3R#Nhd-&`<&TWz<x2bfCH|^;|!vNgKIVDjYB?-{fai-Q#kBT<7_^gFW`u$FySdoas|m%ILh#ZgeRTc"
    "swFF3iKl!LyT{$;p3Ku%%J4atJ(*`bnP<7obFR$u3{w(ba6ZIZl4?mdgR)QKKx_45Jmz1Iq2Y8U1;xWxJbaboYc5"
    "`8n3gcJil-seefXoinDqo2S0s5hRVd)NC-9;tpmBkwD?r6hmtZ(4=?D}6AAe6>F?)E^@4r|`59eWdc;?}4j-Pe$C"
    "m2pjnDhMG4*!&Y3Fg>p9=&wM{NyR;@v_Hnd;C{8|5cYi&+wXr*FF0cUDxo2A5Tp^{G0yO&80K6x(gn@<KY)Me#yn"
    "3W;i3^ExV1kom4GTbyjK$Q}B-S{9TzE1-#eBS!amdP3e6xWLZ|lc}F)`qe(lEi4WTN(A$Cd9)geB_*fL$_(a}JZB"
    "4zYwwT>4SM2F&>iub8r6JQr%9(RyI!30?bJJ9^E^yPIxu!2Nd@kV&%aS+n4U_LF<r!1A4GUjRVY!X32IVl{>`Z*U"
    "Z{*kW{CB~bL8q^UZ>I3AC@8jKJ5{uzS`6O>SCnFbe}~_DMd^n%Md=d5j}m_38|f6^NCRqFD5z?LgHj+8^xZ^*id!"
    "rwL*qfF`+_QXf6ykeF6g651nsNqgR0bqpqjEVC>1vaE%jzK84}!IpLdQ3Yk&PKzFT2isr&qQA=bV8=kn#t{2W`;v"
    "G+`fg?f!EBdgZ~rR_fQ{0JRN^rx7oSf*H^_=7?i6@)Dm0~9HW62%0?F$#lXo??mOEX6sBWr|A_KU4fNx@wbKjQdr"
    "0(SejpBd&wxk>2=!quATME3I%x-Mf$wiusKD<6k$eoxK"
)
