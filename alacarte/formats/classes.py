"""The names that a model file may contain. Everything that is not named here is refused.

CLASSES are the estimators of scikit-learn 1.9 (`sklearn.utils.all_estimators`) and the parts that they hold after fit, and
those of LightGBM 4.7 and XGBoost 3.2, whose Booster reads its trees in compiled code. Each stands under the first two parts of
the module that defines it. skops makes such an object without its constructor and sets its attributes;
alacarte/formats/objects.py then checks the attributes.
FUNCTIONS may be called with any argument: a function that reads, writes, imports or evaluates does not
belong on this list (numpy.load and pandas.read_pickle are functions too). LOSSES are called with the arguments in the file.
Left out on purpose: sklearn.callback, sklearn.datasets, sklearn.externals, sklearn.utils._testing; and distance metrics
that call a function or whose matrix can be read out of bounds (PyFunc, Mahalanobis, SEuclidean).
"""

import re

Names = frozenset[tuple[str, str]]


def _names(text: str) -> Names:
    """(module, name) of each name in lines of `module: name name`; a line that is indented belongs to the line before it."""
    lines = re.sub(r"\n +", " ", text).split("\n")
    return frozenset(
        (module, name) for module, _, names in (line.partition(":") for line in lines) for name in names.split()
    )


def is_class(module: str, name: str) -> bool:
    """Whether a class is on the list. Whether `module` defines it is another question."""
    return (".".join(module.split(".")[:2]), name) in CLASSES


CLASSES = _names("""\
lightgbm.basic: Booster
lightgbm.sklearn: LGBMClassifier LGBMRegressor
scipy.interpolate: BSpline
sklearn._loss: AbsoluteError ExponentialLoss HalfBinomialLoss HalfBinomialLossArrayAPI HalfGammaLoss HalfLogitLink
    HalfMultinomialLoss HalfMultinomialLossArrayAPI HalfPoissonLoss HalfPoissonLossArrayAPI HalfSquaredError HalfTweedieLoss
    HalfTweedieLossIdentity HuberLoss IdentityLink Interval LogLink LogitLink MultinomialLogit PinballLoss
sklearn.calibration: CalibratedClassifierCV _CalibratedClassifier _SigmoidCalibration _TemperatureScaling
sklearn.cluster: AffinityPropagation AgglomerativeClustering BisectingKMeans DBSCAN FeatureAgglomeration HDBSCAN KMeans
    MeanShift MiniBatchKMeans OPTICS SpectralBiclustering SpectralClustering SpectralCoclustering _BisectingTree
sklearn.compose: ColumnTransformer TransformedTargetRegressor make_column_selector
sklearn.covariance: EllipticEnvelope EmpiricalCovariance GraphicalLasso GraphicalLassoCV LedoitWolf MinCovDet OAS
    ShrunkCovariance
sklearn.cross_decomposition: CCA PLSCanonical PLSRegression PLSSVD
sklearn.decomposition: DictionaryLearning FactorAnalysis FastICA IncrementalPCA KernelPCA LatentDirichletAllocation
    MiniBatchDictionaryLearning MiniBatchNMF MiniBatchSparsePCA NMF PCA SparseCoder SparsePCA TruncatedSVD
sklearn.discriminant_analysis: LinearDiscriminantAnalysis QuadraticDiscriminantAnalysis
sklearn.dummy: DummyClassifier DummyRegressor
sklearn.ensemble: AdaBoostClassifier AdaBoostRegressor BaggingClassifier BaggingRegressor ExtraTreesClassifier
    ExtraTreesRegressor GradientBoostingClassifier GradientBoostingRegressor HistGradientBoostingClassifier
    HistGradientBoostingRegressor IsolationForest RandomForestClassifier RandomForestRegressor RandomTreesEmbedding
    StackingClassifier StackingRegressor TreePredictor VotingClassifier VotingRegressor _BinMapper
sklearn.feature_extraction: CountVectorizer DictVectorizer FeatureHasher HashingVectorizer PatchExtractor TfidfTransformer
    TfidfVectorizer
sklearn.feature_selection: GenericUnivariateSelect RFE RFECV SelectFdr SelectFpr SelectFromModel SelectFwe SelectKBest
    SelectPercentile SequentialFeatureSelector VarianceThreshold
sklearn.frozen: FrozenEstimator
sklearn.gaussian_process: CompoundKernel ConstantKernel DotProduct ExpSineSquared Exponentiation GaussianProcessClassifier
    GaussianProcessRegressor Matern PairwiseKernel Product RBF RationalQuadratic Sum WhiteKernel
    _BinaryGaussianProcessClassifierLaplace
sklearn.impute: IterativeImputer KNNImputer MissingIndicator SimpleImputer
sklearn.isotonic: IsotonicRegression
sklearn.kernel_approximation: AdditiveChi2Sampler Nystroem PolynomialCountSketch RBFSampler SkewedChi2Sampler
sklearn.kernel_ridge: KernelRidge
sklearn.linear_model: ARDRegression BayesianRidge ElasticNet ElasticNetCV GammaRegressor HuberRegressor Lars LarsCV Lasso
    LassoCV LassoLars LassoLarsCV LassoLarsIC LinearRegression LogisticRegression LogisticRegressionCV MultiTaskElasticNet
    MultiTaskElasticNetCV MultiTaskLasso MultiTaskLassoCV OrthogonalMatchingPursuit OrthogonalMatchingPursuitCV
    PassiveAggressiveClassifier PassiveAggressiveRegressor Perceptron PoissonRegressor QuantileRegressor RANSACRegressor
    Ridge RidgeCV RidgeClassifier RidgeClassifierCV SGDClassifier SGDOneClassSVM SGDRegressor TheilSenRegressor
    TweedieRegressor
sklearn.manifold: ClassicalMDS Isomap LocallyLinearEmbedding MDS SpectralEmbedding TSNE
sklearn.metrics: BrayCurtisDistance64 CanberraDistance64 ChebyshevDistance64 EuclideanDistance64 HammingDistance64
    HaversineDistance64 ManhattanDistance64 MinkowskiDistance64 _CurveScorer _MultimetricScorer _PassthroughScorer _Scorer
sklearn.mixture: BayesianGaussianMixture GaussianMixture
sklearn.model_selection: FixedThresholdClassifier GridSearchCV GroupKFold GroupShuffleSplit HalvingGridSearchCV
    HalvingRandomSearchCV KFold LeaveOneGroupOut LeaveOneOut LeavePGroupsOut LeavePOut PredefinedSplit RandomizedSearchCV
    RepeatedKFold RepeatedStratifiedKFold ShuffleSplit StratifiedGroupKFold StratifiedKFold StratifiedShuffleSplit
    TimeSeriesSplit TunedThresholdClassifierCV
sklearn.multiclass: OneVsOneClassifier OneVsRestClassifier OutputCodeClassifier _ConstantPredictor
sklearn.multioutput: ClassifierChain MultiOutputClassifier MultiOutputRegressor RegressorChain
sklearn.naive_bayes: BernoulliNB CategoricalNB ComplementNB GaussianNB MultinomialNB
sklearn.neighbors: BallTree KDTree KNeighborsClassifier KNeighborsRegressor KNeighborsTransformer KernelDensity
    LocalOutlierFactor NearestCentroid NearestNeighbors NeighborhoodComponentsAnalysis RadiusNeighborsClassifier
    RadiusNeighborsRegressor RadiusNeighborsTransformer
sklearn.neural_network: AdamOptimizer BernoulliRBM MLPClassifier MLPRegressor SGDOptimizer
sklearn.pipeline: FeatureUnion Pipeline
sklearn.preprocessing: Binarizer FunctionTransformer KBinsDiscretizer KernelCenterer LabelBinarizer LabelEncoder
    MaxAbsScaler MinMaxScaler MultiLabelBinarizer Normalizer OneHotEncoder OrdinalEncoder PolynomialFeatures
    PowerTransformer QuantileTransformer RobustScaler SplineTransformer StandardScaler TargetEncoder
sklearn.random_projection: GaussianRandomProjection SparseRandomProjection
sklearn.semi_supervised: LabelPropagation LabelSpreading SelfTrainingClassifier
sklearn.svm: LinearSVC LinearSVR NuSVC NuSVR OneClassSVM SVC SVR
sklearn.tree: DecisionTreeClassifier DecisionTreeRegressor ExtraTreeClassifier ExtraTreeRegressor
sklearn.utils: MetadataRequest MethodMetadataRequest
xgboost.core: Booster
xgboost.sklearn: XGBClassifier XGBRegressor
""")

FUNCTIONS = _names("""\
numpy: asarray mean
pandas: NA
scipy._lib.array_api_compat.numpy._aliases: asarray
sklearn.cluster._kmeans: _kmeans_single_elkan _kmeans_single_lloyd
sklearn.feature_selection._mutual_info: mutual_info_classif mutual_info_regression
sklearn.feature_selection._univariate_selection: chi2 f_classif f_regression r_regression
sklearn.metrics._classification: accuracy_score balanced_accuracy_score brier_score_loss d2_brier_score d2_log_loss_score
    f1_score jaccard_score log_loss matthews_corrcoef precision_score recall_score
sklearn.metrics._ranking: average_precision_score roc_auc_score top_k_accuracy_score
sklearn.metrics._regression: d2_absolute_error_score explained_variance_score max_error mean_absolute_error
    mean_absolute_percentage_error mean_gamma_deviance mean_poisson_deviance mean_squared_error mean_squared_log_error
    median_absolute_error r2_score root_mean_squared_error root_mean_squared_log_error
sklearn.metrics._scorer: negative_likelihood_ratio positive_likelihood_ratio
sklearn.metrics.cluster._supervised: adjusted_mutual_info_score adjusted_rand_score completeness_score fowlkes_mallows_score
    homogeneity_score mutual_info_score normalized_mutual_info_score rand_score v_measure_score
sklearn.utils.validation: check_array
""")

LOSSES = _names("""\
sklearn._loss._loss: CyAbsoluteError CyExponentialLoss CyHalfBinomialLoss CyHalfGammaLoss CyHalfMultinomialLoss
    CyHalfPoissonLoss CyHalfSquaredError CyHalfTweedieLoss CyHalfTweedieLossIdentity CyHuberLoss CyPinballLoss
sklearn.linear_model._sgd_fast: EpsilonInsensitive Hinge ModifiedHuber SquaredEpsilonInsensitive SquaredHinge
""")

SCALARS = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 longdouble complex64 complex128 str_"
    " bytes_ datetime64 timedelta64"
)

# The other kinds of node in a file, and the names that each kind may have. Left out on purpose, because they call or bind
# a function that the file names: MethodNode, OperatorFuncNode, ConstructorFromReduceNode.
NODES: dict[str, Names] = {
    "LossNode": LOSSES,
    "FunctionNode": FUNCTIONS,  # and the ufuncs of numpy and scipy
    "TreeNode": _names("sklearn.tree._tree: Tree"),
    "PartialNode": _names("functools: partial"),  # of one of these functions: boosted trees with categories
    "TypeNode": _names(  # skops writes a function in C, such as asarray, as a type
        f"builtins: bool int float str list tuple set dict\nnumpy: {SCALARS} asarray\ncollections: OrderedDict"
    ),
    "JsonNode": _names("builtins: str"),
    "DictNode": _names("builtins: dict\ncollections: OrderedDict\nsklearn.utils._bunch: Bunch"),
    "DefaultDictNode": _names("collections: defaultdict"),  # a Booster's scores
    "BytearrayNode": _names("builtins: bytearray"),  # a Booster's trees
    "ListNode": _names("builtins: list"),
    "TupleNode": _names("builtins: tuple\nsklearn.impute._iterative: _ImputerTriplet"),
    "SetNode": _names("builtins: set"),
    "SliceNode": _names("builtins: slice"),
    "NdArrayNode": _names(f"numpy: ndarray {SCALARS}"),
    "MaskedArrayNode": _names("numpy.ma: MaskedArray"),
    "DTypeNode": _names("numpy: dtype"),
    "RandomStateNode": _names("numpy.random.mtrand: RandomState"),
    "RandomGeneratorNode": _names("numpy.random._generator: Generator"),
    "SparseMatrixNode": _names(
        "\n".join(f"scipy.sparse._{kind}: {kind}_matrix {kind}_array" for kind in ("bsr", "coo", "csc", "csr", "dia"))
    ),
}

# What a .keras file may name.
KERAS = _names("""\
keras: DTypePolicy Sequential
keras.constraints: MaxNorm NonNeg UnitNorm
keras.initializers: Constant GlorotNormal GlorotUniform HeNormal HeUniform LecunNormal LecunUniform Ones Orthogonal
    RandomNormal RandomUniform TruncatedNormal VarianceScaling Zeros
keras.layers: Activation Add AlphaDropout Average AveragePooling1D AveragePooling2D BatchNormalization Concatenate Conv1D
    Conv2D Dense DepthwiseConv1D DepthwiseConv2D Dropout ELU Flatten GaussianDropout GaussianNoise
    GlobalAveragePooling1D GlobalAveragePooling2D GlobalMaxPooling1D GlobalMaxPooling2D GroupNormalization InputLayer
    LayerNormalization LeakyReLU MaxPooling1D MaxPooling2D Maximum Minimum Multiply PReLU Permute ReLU RepeatVector
    Rescaling Reshape SeparableConv1D SeparableConv2D Softmax SpatialDropout1D SpatialDropout2D Subtract
    UnitNormalization ZeroPadding1D ZeroPadding2D
keras.regularizers: L1 L1L2 L2
keras.src.models.functional: Functional
""")
