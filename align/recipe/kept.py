"""What an optimizer keeps of a matrix of 64 x 64 after two steps, in numbers of four bytes for each weight.

Projected gradients are of rank 16 here, a quarter; `lorarite` has two factors of that rank in the matrix's place. A
test measures all that are installed.
"""

_KEPT: dict[str, dict[float, str]] = {
    "align": {
        0.5: "dct_adamw",
        2.0: "lamb",
    },
    "transformers": {
        0.0: "sgd",
        0.03: "adafactor",
        0.27: "galore_adafactor",
        0.32: "lion_8bit paged_lion_8bit rmsprop_bnb_8bit",
        0.63: "adamw_bnb_8bit adamw_8bit paged_adamw_8bit",
        0.75: "galore_adamw apollo_adamw",
        0.89: "ademamix_8bit paged_ademamix_8bit",
        1.0: ("adagrad lion_32bit paged_lion_32bit rmsprop rmsprop_bnb rmsprop_bnb_32bit schedule_free_sgd"),
        2.0: ("adamw_torch adamw_torch_fused paged_adamw_32bit schedule_free_radam schedule_free_adamw stable_adamw"),
        3.0: "ademamix paged_ademamix_32bit",
    },
    "torch": {
        0.0: "sgd",
        0.03: "adafactor",
        1.0: "adagrad asgd muon rmsprop",
        2.0: "adadelta adam adamax adamw nadam radam rprop",
    },
    "pytorch_optimizer": {
        0.0: "amos asgd fromage pid rose scionlight sgd sgdw",
        0.02: "nero",
        0.03: "racs",
        0.06: "adalite",
        0.27: "sara",
        0.53: "adafactor flashadamw",
        0.75: "apollo fira galore",
        1.0: (
            "accsgd adago bcos gravity lars lion muon muonclip novograd qhm rmsprop schedulefreesgd scion "
            "sgdp sgdsai signsgd spectralsphere tiger"
        ),
        1.02: "normuon",
        1.03: "sm3",
        1.06: "came",
        2.0: (
            "adabelief adabound adadelta adagc adam adamax adamc adamp adams adamuon adamw adamwsn adanorm "
            "adopt aida ano avagrad dadaptlion dualadam exadam fadam focus ftrl grams kate laprop magma "
            "msvag nadam padam pnm qhadam radam schedulefreeadamw schedulefreeradam simplifiedademamix srmm "
            "stableadamw stablespam swats tam yogi"
        ),
        2.25: "lorarite spam",
        3.0: (
            "adai adamg adamod adatam ademamix aggmo apollodqn conda dadaptadagrad dadaptadam dadaptsgd "
            "diffgrad grokfastadamw kron madgrad mars ranger vsgd"
        ),
        4.0: "adan adapnm adasmooth prodigy",
        4.02: "alice",
        5.0: "dadaptadan ranger21 shampoo",
        6.0: "dash scalableshampoo soap splus",
    },
}
KEPT = {
    (source, name): numbers for source, own in _KEPT.items() for numbers, names in own.items() for name in names.split()
}
"""Source and name -> numbers for each weight."""
